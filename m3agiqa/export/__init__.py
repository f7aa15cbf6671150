"""From scores to what a trainer reads: one file for each layout. Image files are copied bit for bit, or referred to."""
