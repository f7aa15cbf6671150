"""From scores to a training set: a recipe's rules, each as SQL over the scores in DuckDB. Knows nothing of Ray."""
