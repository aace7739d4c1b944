"""How a truncation study is told: findings, sentences, pictures, the files of its report, and loggers."""
