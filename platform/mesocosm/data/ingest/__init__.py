"""Import of logs: readers/ for formats, schema.py for columns, episodes.py joins rows."""
