"""Serves image classifiers over REST. Knows neither torch nor `training`; see `service.app` for how it is wired."""
