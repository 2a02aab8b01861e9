"The published methods, each a function that returns a plan."
