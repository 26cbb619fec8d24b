"""The one Transformer and its parts; transformer.py is where to begin reading."""
