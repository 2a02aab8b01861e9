"The reproduction: records, experiments, measurements, claims."
