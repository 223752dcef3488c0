"""Every decision about where arrays live: meshes, logical axes, and the collectives between devices."""
