"""What ranks know of one another and of their parts of tensors."""
