"""What several tasks need; the tasks themselves are the modules beside this folder."""
