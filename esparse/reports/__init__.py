"""Many records as tables, pictures and pages; this package reads records and nothing else of esparse."""
