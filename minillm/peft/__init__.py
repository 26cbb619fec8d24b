"""Methods that adapt a finished model by moving few of its weights; inject.py is where to begin reading."""
