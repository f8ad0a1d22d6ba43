"""Model cards, bundles and uploads."""
