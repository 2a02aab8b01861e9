"The mathematics: schedule, sampling, plans, advantages, loss. Needs torch alone."
