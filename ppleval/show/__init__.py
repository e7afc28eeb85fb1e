"""Results as tables and pictures; a scored text as HTML. No number is made here."""
