"""report.html and summary.json of an evaluation, from jinja2 templates."""
