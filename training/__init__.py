"""Trains BatchNorm classifiers, folds the BatchNorm, exports artifacts that `service` reads."""
