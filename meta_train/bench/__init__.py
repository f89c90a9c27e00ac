"""One benchmark for optimizers and for models on weight spaces: jobs, their store, measures, tables, pictures."""
