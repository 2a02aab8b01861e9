"Rewards by name: published models, a server, and functions of your own."
