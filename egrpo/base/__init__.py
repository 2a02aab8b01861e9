"Inputs, files and intervals: what every room may import."
