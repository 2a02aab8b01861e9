"Pictures in one style."
