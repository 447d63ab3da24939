// A browser keeps no Secure cookie from a page without TLS, save from loopback: better said before than wondered after.
document.getElementById("plain").hidden = window.isSecureContext;
