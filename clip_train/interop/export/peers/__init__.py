"""Programs that the other libraries' own Pythons run, one for each library. They import nothing of clip-train."""
