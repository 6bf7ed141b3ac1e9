"""Using a trained model: files to vectors, search in files, export, doctor, a smaller model."""
