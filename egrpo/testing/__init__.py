"Small pipelines and rewards with random weights, for tests."
