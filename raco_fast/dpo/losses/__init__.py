"""Preference losses: from the scores of labelled pairs to one scalar per objective."""
