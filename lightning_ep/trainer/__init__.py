"""Where Lightning's Trainer meets sharded parameters: precision, clipping, optimizers, loaders, signals, refusals."""
