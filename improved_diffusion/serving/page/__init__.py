"""The page: a Streamlit app, which `serve.py page` starts."""
