"""The verbs: each in a file of its own, as a LightningModule or, for a whole experiment, a chain of these."""
