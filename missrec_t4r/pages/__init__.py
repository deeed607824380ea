"""The building blocks of all HTML pages: document, sections, tables and charts."""
