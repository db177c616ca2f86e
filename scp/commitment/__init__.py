"""Storage Commitment Push Model as a provider (PS3.4 Annex J)."""
