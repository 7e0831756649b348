"""The paper's two techniques: weight refactorization and momentum reset."""
