"""From finished runs to results/<profile>/: archives, figures, tables, report in Markdown and HTML, README table."""
