"""The classes of a made-up world, and their colours."""

COLOURS = {"sky": (90, 150, 240), "road": (90, 90, 90), "grass": (60, 170, 50), "bus": (220, 40, 40)}
