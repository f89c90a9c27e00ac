"""The experiments on weight spaces: grids of runs, tables with the published numbers beside, and pictures."""
