"""A blind survey among people about generated images: the page, a server that collects the answers, the report."""
