"""From files and data sets to packed batches: groups -> pairs -> tokens -> prepared folder -> batches."""
