"""What a server gets and says: repositories, configs, plans, the models in Python, its statistics."""
