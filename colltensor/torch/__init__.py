"""For torch users only. Imports torch; nothing outside this folder imports it but by name, when it is needed."""
