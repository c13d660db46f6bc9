"""Pages about what runs left behind; they read those files and import nothing that wrote them."""
