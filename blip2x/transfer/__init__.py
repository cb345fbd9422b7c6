"""Large files from the web, and what people see of them on their way."""
