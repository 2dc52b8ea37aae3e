"""The report card: pictures, charts and the page that holds them."""
