"""How good a finished run is: `measures` counts, `drawing` shows, `report` writes files and one page."""
