"""How a truncation study is told: sentences, tables, pictures, the files of its report, and loggers."""
