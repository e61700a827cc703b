"""Show results to people: tables, pictures, a sentence, a page."""
