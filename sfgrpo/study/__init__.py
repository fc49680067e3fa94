"""The study: both methods over rows and seeds, measured, drawn and written up."""
