"""Batch independence: the static proof, the probe, the certificate with its fingerprint, and receipts."""
