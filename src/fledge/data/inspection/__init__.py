"""Looking at records: reports, samples, spot checks."""
