"""FSDP2's groups of parameters, and where its passes begin, end and break off."""
