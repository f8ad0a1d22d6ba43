"""Images, masks and depth maps from folders, tables, archives and the Hub."""
