"""How faithful, how obedient and how copied generated images are."""
