"""Model cards, made from report.json and measurements."""
