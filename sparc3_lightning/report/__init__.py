"""From results to what people read: tables, pictures, a sentence, a page."""
