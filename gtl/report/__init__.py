"""Pages about what runs and studies left behind; they read those files and import nothing that wrote them."""
